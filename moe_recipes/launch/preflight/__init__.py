"""Preflight: is every node of a job fit for it? Asked before hundreds of GPUs start to wait for one another.

probe.py        a probe's verdict, and how probes run side by side, each with its own time limit
plan.py         what the nodes are asked, written once into the attempt's folder
gpus.py         nvidia-smi        container.py   image, flags, environment       limits.py   ulimits, /dev/shm, clock
disk.py         the checkpoint file system        inputs.py      model files, data, hub, secrets, walltime
clock.py        the batch host's clock, asked over the network
node.py         what is asked of a node, inside or outside the container      task.py   the process that asks it
report.py       all records -> one verdict a node, the --exclude list and the exit code
step.py         the host side: start the nodes' tasks, wait, merge            verb.py   `moe-recipes preflight`
cause.py        a report as the cause of a supervised job's end
"""
