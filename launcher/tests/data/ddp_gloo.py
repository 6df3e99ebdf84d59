"""The usual DistributedDataParallel program: it knows nothing but torch's environment variables."""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel


def train(fail_on):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert rank == int(os.environ["RANK"])

    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Linear(10, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        if rank == fail_on and step == 1:
            raise ValueError("broken clip")
        loss = nn.functional.mse_loss(model(torch.randn(8, 10)), torch.randn(8, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    weight = model.module.weight.detach()
    all_weights = [torch.empty_like(weight) for _ in range(world_size)]
    dist.all_gather(all_weights, weight)
    assert all(torch.equal(weight, other) for other in all_weights)
    print(f"rank {rank} of {world_size}: parameters are equal after 3 steps")


@record
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fail-on", type=int, default=-1)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    train(args.fail_on)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # torch 2.11 aborts now and then while Python shuts down, if a thread of its own is late ("terminate called
    # without an active exception"), also without any launcher: 6 of 16 runs on an overloaded machine.
    sys.stdout.flush()
    os._exit(0)
