"""The exception tree: exit codes, image codes, and own errors found inside those that wrap them."""

from __future__ import annotations

import json
import pickle

import pytest

from ray_cxr import errors


def test_tree_and_exit_codes() -> None:
    base, wrong_input = errors.RayCxrError, errors.InputError
    kinds = (errors.ConfigError, errors.TableError, errors.LeakError, errors.BundleError, errors.OutputError)
    assert all(kind.__bases__ == (wrong_input,) and kind.exit_code == 2 for kind in kinds)
    others = (wrong_input, errors.ErrorRateExceeded, errors.ImageError, errors.DivergedError)
    assert all(kind.__bases__ == (base,) for kind in others)
    assert [kind.exit_code for kind in (base, *others)] == [1, 2, 3, 1, 1]


def test_image_errors() -> None:
    assert {"missing", "permission", "storage", "decode_timeout", "decoder_crash"} == errors.RETRYABLE_CODES
    for code in errors.ERROR_CODES:
        error = pickle.loads(pickle.dumps(errors.ImageError(code, "what is wrong")))
        assert type(error) is errors.ImageError
        assert (error.code, error.message, str(error)) == (code, "what is wrong", f"{code}: what is wrong")
    with pytest.raises(ValueError, match="'broken'"):
        errors.ImageError("broken", "x")


def test_error_survives_as_a_record() -> None:
    for error in (
        errors.RayCxrError("plain"),
        errors.BundleError("b: not a bundle"),
        errors.ErrorRateExceeded("9 of 10 images failed", report=object()),
        errors.DivergedError("the loss is nan at epoch 1; lower the rate", "the loss is nan"),
        errors.ImageError("blank", "one value"),
    ):
        found = errors.from_record(json.loads(json.dumps(errors.to_record(error))))
        assert (type(found), str(found), found.exit_code) == (type(error), str(error), error.exit_code)
        for name in error.fields:
            assert getattr(found, name) == getattr(error, name)
        assert type(pickle.loads(pickle.dumps(error if error.fields else found))) is type(error)


@pytest.mark.parametrize("name", ["Unknown", "Mapping", "to_record"])
def test_record_of_an_unknown_type_is_a_plain_error(name: str) -> None:
    found = errors.from_record({"type": name, "message": "what is wrong", "details": {"field": 1}})
    assert (type(found), str(found)) == (errors.RayCxrError, "what is wrong")


def raised(error: BaseException, cause: BaseException) -> BaseException:
    """Return an error as `raise error from cause` leaves it."""
    error.__cause__ = cause
    return error


class Wrapping(Exception):
    """An error as Ray raises it: the worker's error is in `cause`, or in a table of ranks."""

    def __init__(self, cause: object = None, worker_failures: object = None) -> None:
        super().__init__("a wrapper")
        self.cause = cause
        self.worker_failures = worker_failures


OURS = errors.TableError("ours")


def test_own_error_is_found() -> None:
    """Ray's exception is an instance of our class as well, and its text is a traceback."""
    from ray.exceptions import RayTaskError

    raised_by_ray = RayTaskError("prepare", "Traceback ...", OURS).as_instanceof_cause()
    assert isinstance(raised_by_ray, errors.TableError)
    for error in (
        raised_by_ray,
        OURS,
        raised(RuntimeError("outer"), raised(ValueError("middle"), OURS)),
        Wrapping(cause=Wrapping(cause=OURS)),
        Wrapping(worker_failures={0: ValueError("not this"), 1: OURS}),
        raised(RuntimeError("outer"), Wrapping(worker_failures={3: raised(KeyError("x"), Wrapping(cause=OURS))})),
    ):
        assert errors.own_error(error) is OURS


def test_operating_system_errors_count_but_lost_connections_and_other_errors_do_not() -> None:
    full = OSError(28, "No space left on device")
    assert errors.own_error(Wrapping(cause=full)) is full
    in_context = RuntimeError("a bug in the handling of our error")
    in_context.__context__ = OURS
    circle, other = Wrapping(), Wrapping()
    circle.cause, other.cause = other, circle
    unusable = [Wrapping(cause="a text"), Wrapping(worker_failures=["a list"]), Wrapping(worker_failures={0: "a text"})]
    lost = Wrapping(cause=ConnectionResetError()), TimeoutError()
    for error in (ValueError("a bug"), in_context, circle, *unusable, *lost):
        assert errors.own_error(error) is None
