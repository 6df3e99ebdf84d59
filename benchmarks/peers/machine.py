"""What the numbers were measured on: hardware, driver and versions, for the head of every result."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess


def describe(torch, device, libraries=()):
    """A flat dict for the JSON; `libraries` names further distributions whose versions matter."""
    m = dict(cpu=cpu_name(), cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(),
             python=platform.python_version(), torch=torch.__version__, load_1m=round(os.getloadavg()[0], 2))
    if device.type == "cuda":
        m.update(gpu=torch.cuda.get_device_name(device), driver=driver(), cuda=torch.version.cuda,
                 cudnn=torch.backends.cudnn.version(), nccl=".".join(map(str, torch.cuda.nccl.version())))
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            m[name] = importlib.metadata.version(name)
    return m


def cpu_name():
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def driver():
    """The NVIDIA driver's version, or why it is not known."""
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"unknown: {type(e).__name__}"
    return out.stdout.splitlines()[0].strip() if out.returncode == 0 and out.stdout.strip() else "unknown"


def headline(m):
    """One line for a table's head."""
    parts = [m["gpu"]] if "gpu" in m else []
    parts += [m["cpu"], f"{m['cores']} cores", f"torch {m['torch']}"]
    parts += [f"{k} {m[k]}" for k in ("driver", "cuda", "cudnn", "nccl") if k in m]
    return ", ".join(parts)


def today():
    return datetime.date.today().isoformat()


def write_json(path, result):
    """Whole or not at all: a run cut by a time limit leaves the last complete state."""
    with open(path + ".part", "w") as f:
        json.dump(result, f, indent=1)
        f.write("\n")
    os.replace(path + ".part", path)
