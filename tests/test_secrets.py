"""What is secret in the environment stays there: no byte of a run's files and output has it."""

from conftest import SECRETS


def test_secrets_reach_neither_files_nor_output(micro_run):
    files = [path for path in micro_run.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl"} <= {path.name for path in files}
    assert any("checkpoints" in path.parts for path in files)
    output = micro_run.with_suffix(".txt")
    assert "loss" in output.read_text()
    for path in (*files, output):
        data = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in data, f"{name} in {path}"
