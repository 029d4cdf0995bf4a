"""A real Slurm of two nodes on this machine: slurmctld, and slurmd twice under two names.

Needs root, slurm and munge (Debian: slurm-wlm). JAX finds the two processes by itself.
"""

import os
import shutil
import socket
import subprocess
import time

import cluster
import micro
import pytest
from says import lines_with, says

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
missing = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons need root"),
]

# The first is the host's own name: JAX looks for the coordinator there.
HOST = socket.gethostname()
NODES = (HOST, f"{HOST}-second")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Start the daemons; the environment in which srun and sbatch find them."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    ports = [cluster.free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(
        CONFIG.format(folder=folder, ports=ports, host=HOST, nodes=NODES)
    )
    for i in range(8):  # Slurm only looks whether the devices of its GPUs exist
        (folder / f"gpu{i}").touch()
    gpus = "".join(f"NodeName={node} Name=gpu File={folder}/gpu[0-7]\n" for node in NODES)
    (folder / "gres.conf").write_text(gpus)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
    for name in ("socket", "pid", "seed", "log"):
        munge.append(f"--{name if name == 'socket' else name + '-file'}={folder}/munge.{name}")
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    with cluster.group(commands, [environment] * len(commands), folder):
        deadline = time.monotonic() + 60
        while (states := ask(environment, "sinfo", "-h", "-o", "%D %t")) != "2 idle":
            assert time.monotonic() < deadline, (states, [*folder.glob("*.err")])
            time.sleep(1)
        yield environment


def ask(environment, *command):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip()


@pytest.mark.campaign
def test_srun_trains_on_two_nodes(slurm, tmp_path):
    environment = slurm | micro.environment(1) | cluster.FAST
    done = subprocess.run(
        [
            *("srun", "--nodes=2", "--ntasks-per-node=1", "--label"),
            *micro.command(tmp_path / "run", "train.num_steps=2", "data.workers=0"),
        ],
        env=environment,
        cwd=micro.ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    firsts = "\n".join(line for line in done.stdout.splitlines() if line.startswith("0: "))
    says(firsts, "--config.train.num_steps=4")  # how to go on, at the end
    said = [line[3:] for line in done.stdout.splitlines() if line.startswith("1: ")]
    assert cluster.GLOO.sub("", "".join(said)) == ""
    assert lines_with(firsts, 2, "cpu", "data", 2, "fsdp", 1)
    assert [row["step"] for row in micro.rows(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("right", "wrong"), [("", ""), ("--nodes=2", "--nods=2"), ("--nodes=2", "--nodes=two")]
)
def test_sbatch_takes_the_script(slurm, tmp_path, right, wrong):
    script = (micro.ROOT / "launch" / "slurm.sbatch").read_text()
    (tmp_path / "slurm.sbatch").write_text(script.replace(right, wrong) if right else script)
    said = ask(slurm, "sbatch", "--test-only", str(tmp_path / "slurm.sbatch"))
    assert ("to start at" in said) == (not right), said
