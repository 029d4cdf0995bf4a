"""The Hugging Face Hub: one commit of a repository, as a folder in its cache.

jax is not imported here: rooms for worker processes use this one.
"""

from pathlib import Path

from wmjax.errors import UserError, reason


def snapshot(
    repo_id: str, patterns: list[str], *, kind: str, revision: str, where: str, instead: str
) -> Path:
    """Bring the files that match the patterns into the cache and return the folder they are in.

    kind: dataset or model. revision: branch, tag or commit; '': main. Offline, what the cache holds
    is returned. where: how errors begin; instead: what they say to do without a network.
    """
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    try:
        return Path(
            snapshot_download(
                repo_id, repo_type=kind, revision=revision or None, allow_patterns=patterns
            )
        )
    except errors.GatedRepoError:
        fault = f"gated: accept its terms on {page}, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        fault = f"no such {kind} on the Hub, or a private one: check the name, or `hf auth login`"
    except errors.RevisionNotFoundError:
        fault = f"the {kind} has no such branch, tag or commit"
    except errors.LocalEntryNotFoundError:
        fault = (
            "the Hub cannot be reached, and not all that is needed is in the cache; fetch it where "
            f"there is a network, or {instead}"
        )
    except Exception as error:  # whatever else a network or a proxy may come up with
        fault = f"{type(error).__name__}: {reason(error)}"
    raise UserError(f"{where}: {fault}")
