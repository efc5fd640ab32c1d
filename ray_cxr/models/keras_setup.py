"""Import Keras and TensorFlow, without the configuration that the user made for other projects.

Keras reads `keras.json` in the user's home folder and environment variables. They may select another backend, channels
first or float16, which the models here do not support. TensorFlow reads and writes the same file. So all modules import
both from this one: it makes them read the package's own `keras.json`. The user's file and variables stay as they are.
Downloaded weights stay in the user's folder, where other programs find them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ray_cxr import environment
from ray_cxr.errors import ConfigError
from ray_cxr.progress import Stage, silence_stderr

#: The variable with which TensorFlow looks for Keras 2, which is not installed.
LEGACY_KERAS = "TF_USE_LEGACY_KERAS"


def find_keras_folder() -> Path:
    """Return the folder in which Keras keeps downloaded weights, by the rule of Keras; it may not exist yet."""
    if folder := os.environ.get("KERAS_HOME"):
        return Path(folder).expanduser()
    home = Path(os.path.expanduser("~"))
    return (home if home.is_dir() and os.access(home, os.W_OK) else Path("/tmp")) / ".keras"


@contextlib.contextmanager
def hide_user_settings() -> Iterator[None]:
    """Hide the environment variables that configure Keras while the block runs."""
    names = [name for name in os.environ if name.startswith("KERAS_") or name == LEGACY_KERAS]
    saved = {name: os.environ.pop(name) for name in names}
    os.environ["KERAS_HOME"] = str(Path(__file__).parent / "keras_home")
    try:
        yield
    finally:
        del os.environ["KERAS_HOME"]
        os.environ.update(saved)


#: The folder of downloaded weights.
KERAS_FOLDER = find_keras_folder()

_is_configured = "keras" in sys.modules
if not _is_configured:
    # A failed import of Keras leaves submodules with the settings that it read.
    for _name in [name for name in sys.modules if name.startswith("keras.")]:
        del sys.modules[_name]
with contextlib.ExitStack() as _stack:
    _stack.enter_context(hide_user_settings())
    if environment.is_command:
        # TensorFlow's C++ code prints on import and when it looks for GPUs.
        _stack.enter_context(silence_stderr())
        _stack.enter_context(Stage("loading TensorFlow", at_once=True))
    import keras
    import tensorflow as tf
    from keras.src.backend import config as _config

    if environment.is_command:
        tf.config.list_physical_devices()
if not _is_configured:
    # Keras stores downloads next to its keras.json, and has no setting for another folder.
    _config._KERAS_DIR = str(KERAS_FOLDER)
    environment.report_keras_backend()

__all__ = ["KERAS_FOLDER", "check_settings", "hide_user_settings", "keras", "tf"]


def check_settings() -> None:
    """Refuse settings of this process with which models would fail or have other results.

    Only a program that uses this package as a library can have changed them.

    Raises:
        ConfigError: the backend, the image data format or the float type differs.
    """
    needed = {"backend": "tensorflow", "image_data_format": "channels_last", "floatx": "float32"}
    for name, value in needed.items():
        if (found := getattr(keras.config, name)()) != value:
            raise ConfigError(
                f"Keras has {name} {found!r} in this process, but models of ray_cxr need {value!r}. Set it back, or "
                "use a new process (a backend is fixed on import); `Bundle.predict` scores on CPUs without Keras"
            )
