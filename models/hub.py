"""Where a model's files are: `org/name@commit` in the Hugging Face cache (or fetched into it), or `./folder@digest`.

Pinned both ways: a commit of the hub is 40 hex digits, and a folder's digest is made of what lies in it, so neither
changes under a fingerprint. Weights are safetensors only, nothing is unpickled, no code that comes with a model is run.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from .contract import ModelError

PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")  # of a model's files, those that are wanted
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{12}")
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SAMPLE = 1 << 20  # bytes at either end of a weight file that its digest looks at


def split(reference: str) -> tuple[str, str]:
    """Cut `name@revision` at its last @."""
    name, _, revision = reference.rpartition("@")
    return name, revision


def is_folder(name: str) -> bool:
    """Whether a model's name is a path: it starts with /, ./, ../ or ~."""
    return name.startswith(("/", "./", "../", "~"))


def check(reference: str) -> None:
    """Raise ModelError unless a reference is pinned as one on the hub or as a folder. Opens no model."""
    name, revision = split(reference)
    if is_folder(name):
        folder = Path(name).expanduser()
        if not _DIGEST.fullmatch(revision):
            now = f"; as it is now, it is {name}@{digest(folder)}" if folder.is_dir() else ""
            raise ModelError(f"model: {reference!r}: a folder is pinned by 12 hex digits of its content{now}")
    elif not _ON_HUB.fullmatch(name):
        raise ModelError(f"model: {reference!r} is neither org/name@commit nor ./folder@digest")
    elif not _COMMIT.fullmatch(revision):
        raise ModelError(f"model: {reference!r}: a model of the hub is pinned by a commit, 40 hex digits, no branch")


def find(reference: str) -> Path:
    """The folder of a model's files; what the cache lacks is downloaded, unless HF_HUB_OFFLINE=1.

    Raises ModelError, one line: no such folder, other content, no such model or commit, no access, no network, no
    safetensors.
    """
    check(reference)
    name, revision = split(reference)
    folder = Path(name).expanduser() if is_folder(name) else _from_hub(name, revision)
    if not folder.is_dir():
        raise ModelError(f"model {reference}: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {reference}: {folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {reference}: no safetensors weights; other formats can run code and are not loaded")
    if is_folder(name) and (found := digest(folder)) != revision:
        raise ModelError(f"model {reference}: the folder has other content; as it is now, it is {name}@{found}")
    return folder


def config(folder: Path) -> dict[str, Any]:
    """A model's config.json. Raises ModelError where it is no JSON object."""
    try:
        read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {folder}: config.json cannot be read: {error}") from None
    if not isinstance(read, dict):
        raise ModelError(f"model {folder}: config.json is not an object")
    return read


def digest(folder: Path) -> str:
    """12 hex digits over a model folder's files: names, sizes and content, of weights the first and the last MiB only.

    (Weights of 15 GB would take minutes to read whole at each start.) Raises ModelError where a file cannot be read.
    """
    state = hashlib.sha256()
    try:
        for path in sorted(p for pattern in PATTERNS for p in folder.glob(pattern)):
            size = path.stat().st_size
            state.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                if path.suffix != ".safetensors" or size <= 2 * _SAMPLE:
                    state.update(file.read())
                else:
                    state.update(file.read(_SAMPLE))
                    file.seek(-_SAMPLE, 2)
                    state.update(file.read(_SAMPLE))
    except OSError as error:
        raise ModelError(f"model {folder}: {error}") from None
    return state.hexdigest()[:12]


def _from_hub(name: str, revision: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ModelError(f"model {name}: needs `pip install 'vesl[models]'`") from None
    what = f"model {name}@{revision}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError:
        raise ModelError(f"{what}: access is granted on its page; then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{what}: the hub has the model, but no such commit") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{what}: the hub has no such model (or HF_TOKEN may not see it)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ModelError(
            f"{what}: not in the cache, and the hub cannot be reached; fetch it where there is a network: "
            f"hf download {name} --revision {revision}"
        ) from None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{what}: {' '.join(str(error).split())[:300]}") from None


def main() -> int:
    """`python -m vesl.models.hub REFERENCE...` fetches models ahead of a run and says where they are, a line each."""
    code = 0
    for reference in sys.argv[1:]:
        try:
            print(find(reference))
        except ModelError as error:
            print(f"vesl: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
