"""The Hugging Face Hub: download files of one commit into the local cache.

jax is not imported here, because worker processes load this module.
"""

from pathlib import Path

from wmjax.errors import UserError, reason


def snapshot(
    repo_id: str, patterns: list[str], *, kind: str, revision: str, where: str, instead: str
) -> Path:
    """Download the files that match the patterns and return their folder in the cache.

    kind: dataset or model. revision: branch, tag or commit; '': main. Offline, the cached files are
    returned. where: the beginning of errors. instead: what an error advises without a network.
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
            "the Hub cannot be reached, and the cache does not hold all files; download them on a "
            f"machine with a network, or {instead}"
        )
    except Exception as error:  # networks and proxies raise many types
        fault = f"{type(error).__name__}: {reason(error)}"
    raise UserError(f"{where}: {fault}")
