"""Downloads of published weights, which fail within seconds if no host can be reached."""

from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

TIMEOUT = 5.0  # seconds to wait for a host


def check_reachable(url: str) -> None:
    """Raises OSError within seconds if no host answers; download libraries retry for a minute."""
    with suppress(HTTPError):  # the host answers; a refusal is reported by the download itself
        urlopen(Request(url, method="HEAD"), timeout=TIMEOUT).close()


def from_hub(repository: str, names: tuple[str, ...]) -> Path:
    """The first of the files `names` in the local cache, else on the hub.

    Raises OSError or ValueError if there is none.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    for name in names:
        if isinstance(kept := try_to_load_from_cache(repository, name), str):
            return Path(kept)
    check_reachable(hf_hub_url(repository, names[0]))
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(repository, name, etag_timeout=TIMEOUT))
        except (OSError, ValueError):  # the repository may have another of the names
            continue
    return Path(hf_hub_download(repository, names[-1], etag_timeout=TIMEOUT))


def from_url(url: str, name: str, check_hash: bool = False) -> dict:
    """The tensors of a file that torch caches as `name`, loaded as weights only. Raises OSError."""
    import torch

    if not Path(torch.hub.get_dir(), "checkpoints", name).is_file():
        check_reachable(url)
    return torch.hub.load_state_dict_from_url(
        url, map_location="cpu", progress=False, check_hash=check_hash, file_name=name,
        weights_only=True,
    )  # fmt: skip
