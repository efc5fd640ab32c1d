"""The exception tree: exit codes, image codes, and ours found inside other people's wrappings."""

from __future__ import annotations

import pickle

import pytest

from ray_cxr import errors

CODES = (
    "missing",
    "permission",
    "storage",
    "empty",
    "truncated",
    "corrupt",
    "not_an_image",
    "not_a_radiograph",
    "unsupported_transfer_syntax",
    "too_large",
    "too_small",
    "blank",
    "decode_timeout",
    "decoder_crash",
)


def test_codes_are_the_contract() -> None:
    assert errors.ERROR_CODES == CODES
    assert {"missing", "permission", "storage", "decode_timeout", "decoder_crash"} == errors.RETRYABLE_CODES


@pytest.mark.parametrize(
    ("kind", "parent", "code"),
    [
        (errors.RayCxrError, Exception, 1),
        (errors.InputError, errors.RayCxrError, 2),
        (errors.ConfigError, errors.InputError, 2),
        (errors.TableError, errors.InputError, 2),
        (errors.LeakError, errors.InputError, 2),
        (errors.BundleError, errors.InputError, 2),
        (errors.OutputError, errors.InputError, 2),
        (errors.ErrorRateExceeded, errors.RayCxrError, 3),
        (errors.ImageError, errors.RayCxrError, 1),
    ],
)
def test_tree_and_exit_codes(kind: type[errors.RayCxrError], parent: type[Exception], code: int) -> None:
    assert kind.__bases__ == (parent,)
    assert kind.exit_code == code
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("code", CODES)
def test_image_error_survives_pickling(code: str) -> None:
    error = pickle.loads(pickle.dumps(errors.ImageError(code, "what is wrong")))
    assert type(error) is errors.ImageError
    assert (error.code, error.message, str(error)) == (code, "what is wrong", f"{code}: what is wrong")


def test_image_error_refuses_other_codes() -> None:
    with pytest.raises(ValueError, match="unknown image error code 'broken'"):
        errors.ImageError("broken", "x")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


class Wrapping(Exception):
    """As Ray's: the worker's error stands in `.cause`, or in a table of ranks."""

    def __init__(self, cause: object = None, worker_failures: object = None) -> None:
        super().__init__("somebody else's wrapping")
        self.cause = cause
        self.worker_failures = worker_failures


OURS = errors.TableError("ours")


@pytest.mark.parametrize(
    "error",
    [
        OURS,
        raised(RuntimeError("outer"), OURS),
        raised(RuntimeError("outer"), raised(ValueError("middle"), OURS)),
        Wrapping(cause=OURS),
        Wrapping(cause=Wrapping(cause=OURS)),
        Wrapping(worker_failures={0: ValueError("not this"), 1: OURS}),
        Wrapping(worker_failures={0: Wrapping(cause=OURS)}),
        raised(RuntimeError("outer"), Wrapping(worker_failures={3: raised(KeyError("x"), OURS)})),
    ],
)
def test_own_error_is_found(error: BaseException) -> None:
    assert errors.own_error(error) is OURS


def test_an_error_raised_while_ours_was_handled_is_another_error() -> None:
    outer = RuntimeError("a bug in the handling")
    outer.__context__ = OURS
    assert errors.own_error(outer) is None


def test_operating_system_errors_count_but_lost_connections_do_not() -> None:
    full = OSError(28, "No space left on device")
    assert errors.own_error(Wrapping(cause=full)) is full
    assert errors.own_error(Wrapping(cause=ConnectionResetError())) is None
    assert errors.own_error(TimeoutError()) is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("nobody's"),
        Wrapping(cause="a text"),
        Wrapping(worker_failures=["a list"]),
        Wrapping(worker_failures={0: "a text"}),
    ],
)
def test_own_error_of_others_is_none(error: BaseException) -> None:
    assert errors.own_error(error) is None


def test_own_error_ends_on_a_circle() -> None:
    one, two = Wrapping(), Wrapping()
    one.cause, two.cause = two, one
    assert errors.own_error(one) is None
