"""What the codes of a score table mean, in words for a reader."""

from __future__ import annotations

#: Longest id that is shown whole, characters.
_LONGEST = 32
QUALITY: dict[str, str] = {
    "inverted": "gray values look inverted",
    "lateral": "may be a lateral view",
    "not_frontal_chest": "may not be a frontal chest, or has wide borders",
    "reoriented": "was mirrored or turned, put upright",
    "display_fallback": "window of the header not used",
    "out_of_distribution": "unlike the training images",
    "age_outside_training": "age outside the training data",
    "burned_in_annotation": "text burned into the image",
}
ERRORS: dict[str, str] = {
    "missing": "file not found",
    "permission": "no permission to read the file",
    "storage": "disk or store failed",
    "empty": "empty file",
    "truncated": "incomplete file",
    "corrupt": "damaged file",
    "not_an_image": "not an image",
    "not_a_radiograph": "not a radiograph",
    "unsupported_transfer_syntax": "DICOM compression not supported",
    "too_large": "too many pixels",
    "too_small": "too few pixels",
    "blank": "one gray value everywhere",
    "decode_timeout": "decoding took too long",
    "decoder_crash": "decoder crashed",
}


def describe_code(code: str) -> str:
    """Return the words for an error code or a quality flag; an unknown one is returned unchanged."""
    return ERRORS.get(code) or QUALITY.get(code) or code


def shorten_id(text: str) -> str:
    """Return the last 8 characters of an id that is too long for a line, such as a UID of DICOM."""
    return f"…{text[-8:]}" if len(text) > _LONGEST else text
