"""Image files in a request: one as its body, or several as the files of a form."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import numpy as np
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serving import RequestError, valid_text

Decoder = Callable[[bytes, int, int, int], np.ndarray]
"""Image file, height, width, channels -> uint8 [height, width, channels]; errors for people carry an `exit_code`."""

MOST_FILES, MOST_FIELDS = 256, 16


@dataclass(frozen=True)
class Upload:
    """An image file as it came."""

    name: str
    data: bytes


async def read_uploads(request: Request, body: bytes) -> list[Upload]:
    """The files of a form (`multipart/form-data`), or the body itself as one file."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return [Upload("", body)]

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=MOST_FILES, max_fields=MOST_FIELDS).parse()
    except MultiPartException as error:
        raise RequestError(f"the form cannot be read: {error.message}") from None
    except (LookupError, ValueError) as error:  # a boundary or a header that is none
        raise RequestError(f"the form cannot be read: {error}") from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    try:
        uploads = [Upload(valid_text(file.filename or ""), await file.read()) for file in files]
    finally:
        await form.close()
    if not uploads:
        raise RequestError("the form has no file; send images as the files of a form, or one image as the body")
    return uploads
