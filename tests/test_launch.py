"""The files in launch/ under the tools of their engines, which refuse them where mistyped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import micro
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from wmjax.errors import RUN_AGAIN, ExitCode

LAUNCH = micro.ROOT / "launch"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
# SkyPilot is 400 MB and has an environment of its own where there is one.
SKY = os.environ.get("WMJAX_SKY_PYTHON", sys.executable)


def mistyped(name, folder, right, wrong):
    """Return the path of a copy in which one word is wrong."""
    text = (LAUNCH / name).read_text()
    assert right in text
    copy = folder / name
    copy.write_text(text.replace(right, wrong))
    return copy


def lost(document, kept, where=""):
    """Name what of a document a schema did not keep: keys that it does not know."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key not in kept:
                yield f"{where}.{key}"
            else:
                yield from lost(value, kept[key], f"{where}.{key}")
    elif isinstance(document, list):
        for i, value in enumerate(document):
            yield from lost(value, kept[i], f"{where}.{i}")


def jobset_faults(path):
    """Hold the JobSet of a file against the schema of JobSet's own API."""
    (jobset,) = (d for d in yaml.safe_load_all(path.read_text()) if d["kind"] == "JobSet")
    try:
        read = JobsetV1alpha2JobSet.from_dict(jobset)
    except ValueError as error:
        return [str(error)]
    return list(lost(jobset, read.to_dict()))


@pytest.mark.parametrize("name", ["jobset_gpu.yaml", "jobset_tpu.yaml"])
def test_jobsets_are_of_the_schema(name, tmp_path):
    assert jobset_faults(LAUNCH / name) == []
    assert jobset_faults(mistyped(name, tmp_path, "parallelism:", "paralelism:"))
    assert jobset_faults(mistyped(name, tmp_path, "maxRestarts: 10", "maxRestarts: ten"))
    assert jobset_faults(mistyped(name, tmp_path, "nodeSelector:", "nodeselector:"))


# After these the same command goes on; a user's Ctrl-C and a lost terminal are not among them.
SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
KILLED = (signal.SIGABRT, signal.SIGKILL)  # of the process that the others end with PEER_DIED for
AGAIN = {*RUN_AGAIN, *(ExitCode.SIGNAL + number for number in (*SCHEDULERS, *KILLED))}


def test_slurm_requeues_exactly_the_codes_after_which_a_run_goes_on(tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\nexit $CODE\n")
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    for stub in tmp_path.iterdir():
        stub.chmod(0o755)
    requeued = set()
    for code in range(256):
        done = subprocess.run(
            ["bash", LAUNCH / "slurm.sbatch"],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "CODE": str(code),
                "SLURM_JOB_ID": "17",
                "SLURM_CPUS_PER_TASK": "8",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code
        if done.stdout:
            assert done.stdout == "requeue 17\n"
            requeued.add(code)
    assert requeued == AGAIN
    assert not AGAIN & {ExitCode.DONE, ExitCode.DOES_NOT_FIT, ExitCode.MEND}


@pytest.mark.parametrize("name", ["jobset_gpu.yaml", "jobset_tpu.yaml"])
def test_jobsets_restart_exactly_after_the_codes_after_which_a_run_goes_on(name):
    documents = yaml.safe_load_all((LAUNCH / name).read_text())
    (jobset,) = (each["spec"] for each in documents if each["kind"] == "JobSet")
    (job,) = (each["template"]["spec"] for each in jobset["replicatedJobs"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert set(rule["onExitCodes"]["values"]) == AGAIN
    (container,) = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (failed,) = jobset["failurePolicy"]["rules"]
    assert failed["action"] == "FailJobSet"
    assert failed["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["failurePolicy"]["maxRestarts"] > 0


def shellcheck(path):
    return subprocess.run([SHELLCHECK, path], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "typos"),
    [
        ("tpu_vm.sh", [('"$name" --zone', "$nme --zone"), ("}\n", "\n")]),
        ("slurm.sbatch", [("\nesac\n", "\n"), ("case $code in", "case $cod in")]),
    ],
)
def test_shell_scripts_pass_shellcheck(name, typos, tmp_path):
    assert shellcheck(LAUNCH / name).stdout == ""
    for right, wrong in typos:
        assert shellcheck(mistyped(name, tmp_path, right, wrong)).returncode == 1


def has_sky():
    return not subprocess.run(
        [SKY, "-c", "import sky"], capture_output=True, timeout=120
    ).returncode


def sky(path):
    """Return what SkyPilot says of a task; nothing where it takes it."""
    code = f"import sky; sky.Task.from_yaml({str(path)!r})"
    done = subprocess.run([SKY, "-c", code], capture_output=True, text=True, timeout=120)
    return done.stderr[-400:] if done.returncode else ""


@pytest.mark.parametrize("name", ["sky_gpu.yaml", "sky_tpu.yaml"])
def test_skypilot_takes_the_tasks(name, tmp_path):
    if not has_sky():
        pytest.skip("no skypilot here; WMJAX_SKY_PYTHON names an interpreter that has it")
    assert sky(LAUNCH / name) == ""
    assert sky(mistyped(name, tmp_path, "accelerators:", "acelerators:"))
    assert sky(mistyped(name, tmp_path, "setup:", "setpu:"))
