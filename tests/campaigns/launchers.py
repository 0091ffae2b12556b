"""SLURM, and DeepSpeed's launcher over ssh, on two hosts made of namespaces: the commands of docs/many-hosts.md.

    apt-get install slurmctld slurmd slurm-client munge openssh-server pdsh        # and root
    python tests/campaigns/launchers.py --output docs/results/launchers

The scores of each job are compared, byte for byte, with those of two processes of one host; of one job in SLURM a rank
is killed, and the same command given again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fault_jobs import shared
from hosts import Host, find_process, two_hosts, wait_for_lines
from ports import free_port

from lp_plugin.files import write_atomically
from lp_plugin.job.watch.verdict import own_versions

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCUMENTS = 4000
Hosts = tuple[Host, Host]
_SLURM = """ClusterName=two
SlurmctldHost={0.name}({0.address})
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
NodeName={0.name} NodeAddr={0.address} CPUs=2
NodeName={1.name} NodeAddr={1.address} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Trial:
    """A folder with documents and their scores by one host.

    Args:
        folder: Empty.
        hosts: Where the jobs run.
    """

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder, self.hosts = folder, hosts
        settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment = os.environ | settings | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        records = (json.dumps({"id": at, "text": "abcdefghij" * (1 + at % 4)}) for at in range(DOCUMENTS))
        (folder / "documents.jsonl").write_text("\n".join(records), encoding="utf-8")
        self.started: list[subprocess.Popen[bytes]] = []

    def arguments(self, name: str) -> list[str]:
        """Of the job that writes a file of that name."""
        files = ["--input", str(self.folder / "documents.jsonl"), "--output", str(self.folder / name)]
        return ["run", str(shared() / "model"), *files, "--stages", "2", "--micro-batch", "2", "--timeout", "3"]

    def start(self, number: int, *command: object) -> None:
        """Starts what runs as long as the host."""
        words = [*self.hosts[number].enter, *map(str, command)]
        self.started.append(
            subprocess.Popen(words, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def do(self, *command: object) -> tuple[int, str]:
        """Runs something on the first host to its end; its code and what it said."""
        words = [*self.hosts[0].enter, *map(str, command)]
        ended = subprocess.run(
            words,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )
        return ended.returncode, ended.stdout

    def same(self, name: str, code: int) -> str:
        """Whether a job ended well, with the scores of one host."""
        if code:
            return f"ended with {code}"
        equal = (self.folder / name).read_bytes() == (self.folder / "one.jsonl").read_bytes()
        return "the same scores" if equal else "OTHER SCORES"


def start_slurm(trial: Trial) -> None:
    """A controller on the first host, a daemon on each."""
    folder = trial.folder
    (folder / "slurm.conf").write_text(_SLURM.format(*trial.hosts, folder=folder), encoding="utf-8")
    for name in ("state", *(f"spool-{host.name}" for host in trial.hosts)):
        (folder / name).mkdir()
    subprocess.run(["service", "munge", "start"], check=True, capture_output=True)
    trial.start(0, "slurmctld", "-D", "-c")
    for number, host in enumerate(trial.hosts):
        trial.start(number, "slurmd", "-D", "-N", host.name)
    until = time.monotonic() + 30
    while trial.do("sinfo", "--noheader", "--Node", "--states", "idle")[1].count("idle") < len(trial.hosts):
        if time.monotonic() > until:
            raise TimeoutError("SLURM's hosts don't come up")
        time.sleep(0.5)


def batch(trial: Trial, name: str, *, wait: bool = True) -> int:
    """``sbatch examples/slurm.sh``, a task per host; the job's exit code."""
    told = (
        "--nodes",
        2,
        "--ntasks-per-node",
        1,
        "--output",
        trial.folder / f"{name}.out",
        *(["--wait"] if wait else []),
    )
    code, said = trial.do("sbatch", *told, ROOT / "examples" / "slurm.sh", *trial.arguments(name))
    if not said.startswith("Submitted"):
        raise RuntimeError(said)
    return code


def killed_in_slurm(trial: Trial) -> list[str]:
    """A job whose second task is killed, and what became of it."""
    batch(trial, "killed.jsonl", wait=False)
    journal = trial.folder / "killed.jsonl.partial"
    wait_for_lines(journal, DOCUMENTS // 20)
    task = find_process("SLURM_PROCID=1", trial.folder / "killed.jsonl")
    os.kill(task, signal.SIGKILL)
    at = time.monotonic()
    while trial.do("squeue", "--noheader")[1].strip():
        time.sleep(0.1)
    seconds = time.monotonic() - at
    said = (trial.folder / "killed.jsonl.out").read_text(encoding="utf-8")
    named = re.search(r"rank 0 stops: .*", said)
    done = journal.read_bytes().count(b"\n") - 1
    code = batch(trial, "killed.jsonl")
    return [
        f"| SLURM, task 1 killed after {done:,} of {DOCUMENTS:,} documents | out of the queue after {seconds:.1f} s; "
        f"`{named[0] if named else 'NOBODY NAMED'}` |",
        f"| the same command again | {trial.same('killed.jsonl', code)} |",
    ]


def over_ssh(trial: Trial) -> str:
    """``deepspeed --hostfile`` on the first host, through pdsh and ssh."""
    keys = trial.folder / "ssh"
    keys.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / "id_ed25519")], check=True)
    (keys / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    (Path.home() / ".ssh").mkdir(exist_ok=True)
    trial.hosts[0].do("mount", "--bind", keys, Path.home() / ".ssh")
    options = [f"AuthorizedKeysFile={keys}/id_ed25519.pub", "StrictModes=no", "PidFile=none"]
    words = [word for option in options for word in ("-o", option)]
    for number in range(len(trial.hosts)):
        trial.start(number, "/usr/sbin/sshd", "-D", "-h", keys / "id_ed25519", *words)
    time.sleep(1)
    hostfile = trial.folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in trial.hosts), encoding="utf-8")
    launcher = ("deepspeed", "--hostfile", hostfile, "--master_port", free_port(), "--no_python", "--no_local_rank")
    code, _ = trial.do(*launcher, BIN / "lp-plugin", *trial.arguments("ssh.jsonl"))
    return f"| `deepspeed --hostfile`, pdsh and ssh | {trial.same('ssh.jsonl', code)} |"


def main() -> None:
    """Runs the jobs and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for README.md")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="launchers-") as name, two_hosts(Path(name)) as hosts:
        if not hosts[0].is_real:
            sys.exit("needs root, for network namespaces")
        folder = Path(name) / "job"
        folder.mkdir()
        trial = Trial(folder, hosts)
        if trial.do(BIN / "lp-plugin", *trial.arguments("one.jsonl"))[0]:
            sys.exit("the job itself fails")
        start_slurm(trial)
        code = batch(trial, "slurm.jsonl")
        rows = [f"| SLURM, `examples/slurm.sh`, a task per host | {trial.same('slurm.jsonl', code)} |"]
        rows += killed_in_slurm(trial)
        version = trial.do("sinfo", "--version")[1].strip()
        rows.append(over_ssh(trial))
    for process in trial.started:  # the hosts are gone, and all that ran there
        process.wait()
    versions = ", ".join(f"{name} {value}" for name, value in own_versions().items())
    lines = [
        "# Launchers on two hosts",
        "",
        f"`python {' '.join(sys.argv)}`: two hosts made of namespaces of one machine, a stage on each,",
        "Gloo; scores compared byte for byte with those of two processes without a launcher.",
        "",
        "| job | outcome |",
        "|---|---|",
        *rows,
        "",
        f"Versions: {version}, {versions}.",
        "",
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "README.md", "\n".join(lines))
    print("\n".join(rows))
    sys.exit(any(row.count(wrong) for row in rows for wrong in ("OTHER", "NOBODY", "ended with")))


if __name__ == "__main__":
    main()
