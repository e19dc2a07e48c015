"""What goes wrong between here and the Hub, in one line that says what to type next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pathalign.remote import endpoint, explained, is_transport
from pathalign.schema import InputError

ZERO_GPU = "zero-a10g"


@contextmanager
def speaking_of(repo_id: str, repo_type: str = "space") -> Iterator[None]:
    """Turn the errors of the Hub's client into `InputError`s about a repo.

    Raises:
        InputError: Says which repo, what happened, and what to type next.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError(f"Nobody is logged in at {endpoint()}: run `hf auth login`, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE is set: unset it, and run the same command again.") from error
    except HfHubHTTPError as error:
        owner, status = repo_id.split("/")[0], error.response.status_code if error.response is not None else None
        if status == 402:
            raise InputError(
                f"The plan of {owner} does not pay for this Space (402). Choose `--hardware {ZERO_GPU}`, which free "
                f"accounts may have, or see {endpoint()}/pricing; `pathalign grade serve STUDY.yaml` needs no Space."
            ) from error
        if status in (409, 412):
            raise InputError(
                f"{repo_id} was changed by somebody else meanwhile: run the same command again."
            ) from error
        raise explained(error, repo_id, repo_type) from error
    except Exception as error:
        if not is_transport(error):
            raise
        raise InputError(
            f"{endpoint()} cannot be reached ({type(error).__name__}): check your connection and HF_ENDPOINT, and run "
            "the same command again."
        ) from error
