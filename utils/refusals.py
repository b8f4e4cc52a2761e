"""Refusals of S3 and of the tracking server, found behind MLflow's errors: who was not let in, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

S3_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for temporary keys AWS_SESSION_TOKEN too)"
_EXPIRED = {"ExpiredToken", "InvalidToken"}  # S3 answers 400 to these, 403 to all other bad keys
_ABSENT = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_SIGN_IN = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}
"""MLflow's error codes for what HTTP calls 401 and 403."""


def refusal(error: BaseException | None) -> str:
    """Who refuses what, and what to set; "" for an error of any other kind. Trying again mends none of them."""
    for each in _chain(error):
        if type(each).__name__ in _ABSENT:
            return f"there are no S3 keys here ({each}); set {S3_KEYS}"
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's, from S3 itself
            code, status = response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (401, 403) or code in _EXPIRED:
                return f"S3 refuses the keys ({code}); set {S3_KEYS} to keys that may do this"
    for each in _chain(error):
        response = getattr(each, "response", None)
        status = getattr(response, "status_code", None) or _SIGN_IN.get(getattr(each, "error_code", ""))
        if status in (401, 403):
            return _of_the_server(status, f"{each} {getattr(response, 'text', '')}")
    return ""


def refusal_of_its_artifacts(client: Any, run_id: str) -> str:
    """Why nobody gets at a run's artifacts; "" if that is not so.

    MLflow answers 500 where its server's keys do not let it write, and 'does not exist' where they do not let it read;
    only when it lists artifacts does it say more.
    """
    try:
        client.list_artifacts(run_id)
    except Exception as error:
        return refusal(error)
    return ""


def _of_the_server(status: int, text: str) -> str:
    if "s3://" in text:  # its answer, not the client's: it is about the bucket
        return "the tracking server's own S3 keys are refused; whoever runs it has to give it others"
    if status == 401:
        return (
            "the tracking server does not accept the sign-in; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if "ermission denied" in text:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME", "this user")
        return f"the tracking server does not let {user} do this; ask its administrator for EDIT on the experiment"
    return f"the tracking server refuses this ({' '.join(text.split())[:200]}); ask whoever runs it"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
