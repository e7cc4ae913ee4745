"""Whether a name that is no local path can be one on the Hugging Face hub, before its libraries try for a minute."""

from __future__ import annotations

import os
import re

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOOK_S = 10.0


def looks_like_path(name: str) -> bool:
    """Whether `name` can only mean a file or folder here: `./x`, `/x`, `a/b/c`, `x/`, a .json, or below a folder that
    is here."""
    first = name.partition("/")[0]
    return (
        not HUB_NAME.fullmatch(name)
        or name.endswith((".json", ".model", ".txt", ".safetensors", ".gguf"))
        or ("/" in name and os.path.isdir(first))
    )


def missing(name: str) -> str:
    """Why `name` is neither a file or folder here nor a model or tokenizer of the hub, as the end of a sentence that
    begins with it; "" if it is there or may be. Asks the hub once, for at most some seconds, where its cache here has
    nothing of that name."""
    if os.path.exists(name):
        return ""
    if looks_like_path(name):
        return "does not exist: there is no such file or folder."
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    if os.path.isdir(os.path.join(huggingface_hub.constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")):
        return ""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=_LOOK_S)
    except RepositoryNotFoundError:
        return "does not exist: there is no such folder, and the hub has nothing of that name that it shows to you."
    except Exception as error:  # of its own, of httpx, OSError: all that keeps the hub from answering
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        return f"does not exist: there is no such folder, and the hub cannot be asked ({reason})."
    return ""
