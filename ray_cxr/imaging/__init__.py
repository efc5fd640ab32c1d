"""Radiographs: decoding, DICOM, resizing, the sandboxed decoder process, phantoms and heat map overlays."""
