"""Stands in for SLURM's srun: starts the tasks of all "nodes" on this machine, with the variables that srun sets.

Of srun's options it knows ``--kill-on-bad-exit``; the number of nodes and of tasks come from the batch job.
"""

import os
import subprocess
import sys
import time


def main(words):
    kill = "--kill-on-bad-exit=1" in words
    command = words[next(k for k, word in enumerate(words) if not word.startswith("-")) :]
    nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for rank in range(nodes * each):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}
        own |= {"SLURM_NTASKS": nodes * each}
        tasks.append(subprocess.Popen(command, env={**os.environ, **{k: str(v) for k, v in own.items()}}))
    while any(task.poll() is None for task in tasks):
        if kill and any(task.returncode for task in tasks):
            for task in tasks:
                task.terminate()
        time.sleep(0.2)
    return max((abs(task.returncode) for task in tasks), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
