"""What can go wrong, and the closed list of reasons for which an image gives no vector."""


class HubbeamError(Exception):
    """A failure that is told to the user in one clear line: what, where, what to do."""


class ConfigError(HubbeamError):
    """Bad usage or configuration, found before anything ran (exit code 2)."""


class RunError(HubbeamError):
    """The run failed (exit code 1)."""


REASONS: dict[str, str] = {
    "bad_name": "the file's name is not valid UTF-8",
    "not_found": "there is no such file (any more)",
    "permission_denied": "the file or folder may not be read",
    "read_failed": "the storage failed repeatedly while the file was read",
    "empty": "the file has no bytes",
    "too_large": "the file has more bytes than --max-bytes",
    "too_many_pixels": "the picture has more pixels than --max-pixels",
    "unsupported_format": "the content is none of the allowed image formats",
    "truncated": "the image data end early",
    "corrupt": "the image data cannot be decoded",
    "embed_failed": "the module failed on this image",
    "not_finite": "the vector has NaN or infinity in it",
}


class ImageError(HubbeamError):
    """One image gives no vector.

    Attributes:
      reason: one of `REASONS`.
      message: one line for a person.
    """

    def __init__(self, reason: str, message: str):
        if reason not in REASONS:
            raise ValueError(f"unknown reject reason {reason!r}")
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, self.message)
