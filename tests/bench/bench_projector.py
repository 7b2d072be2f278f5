"""Times and weighs the published projector: the MLP alone, ours, and the naive broadcast form.

    python tests/bench/bench_projector.py [--check]

Prints one JSON object last. With --check it exits 1 when ours needs more than 1.5 times the time or
2 times the extra memory of the MLP alone, forward and backward. `METHOD` says how it measures.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sqllava.model.projector import PrototypeExtractor, build_projector

LIMITS = {"time": 1.5, "memory": 2.0}
METHOD = (
    "forward + backward, input and all used weights take gradients; "
    "seconds: least of --repeats rounds that take the forms in turn (CPU: processor time of this "
    "process, which other processes on the machine disturb little; CUDA: wall time); "
    "peak_mib: most that torch's allocator held above what it held before, weight gradients "
    "included (CPU: from the profiler's allocation events; CUDA: max_memory_allocated); "
    "saved_mib: distinct storages that autograd keeps for backward, without weights and input"
)
Step = Callable[[torch.Tensor], torch.Tensor]


def naive_forward(projector: PrototypeExtractor, x: torch.Tensor) -> torch.Tensor:
    """The published form with the projector's weights: x [B, L, D] -> [B, L, text_dim].

    It spreads tokens and centres over [B, N, L, D] twice.
    """

    def pool(tokens: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(tokens.mT, projector.centres).mT  # [B, N, D]

    value, feature = projector.v(x), projector.f(x)  # [B, L, D]
    centres, pooled = pool(x), pool(feature)
    # Normalised over the tokens, not over the features: so it was published.
    value = F.normalize(value.mT, dim=-1)  # [B, D, L]
    for _ in range(projector.iterations):
        similarity = F.normalize(projector.c(centres), dim=-1) @ value  # [B, N, L]
        centres = similarity.softmax(dim=1) @ feature  # [B, N, D]

    cosine = F.normalize(centres, dim=-1) @ F.normalize(x, dim=-1).mT  # [B, N, L]
    share = torch.sigmoid(projector.sim_beta + projector.sim_alpha * cosine)
    mask = torch.zeros_like(share).scatter_(1, share.argmax(dim=1, keepdim=True), 1.0)
    share = (share * mask).unsqueeze(-1)  # [B, N, L, 1]
    members = mask.sum(dim=-1, keepdim=True)  # [B, N, 1]
    prototypes = ((feature.unsqueeze(1) * share).sum(dim=2) + pooled) / (members + 1)  # [B, N, D]
    out = x + (prototypes.unsqueeze(2) * share).sum(dim=1)  # [B, L, D]

    first, _, second = projector.mlp
    hidden = first(out)
    return second(hidden * torch.sigmoid(1.702 * hidden))


def backward(step: Step, modules: nn.Module, x: torch.Tensor) -> None:
    """One forward and backward, from no gradients to no gradients."""
    step(x).sum().backward()
    modules.zero_grad(set_to_none=True)
    x.grad = None


def seconds(step: Step, modules: nn.Module, x: torch.Tensor) -> float:
    """Time of one forward and backward."""
    on_cpu = x.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    start = clock()
    backward(step, modules, x)
    if not on_cpu:
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(step: Step, modules: nn.Module, x: torch.Tensor) -> int:
    """Most memory held at once during a forward and backward, above what is held before."""
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backward(step, modules, x)
        return torch.cuda.max_memory_allocated() - before

    with torch.profiler.profile(profile_memory=True) as profile:
        backward(step, modules, x)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def saved_bytes(step: Step, modules: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, each storage counted once."""
    given = {tensor.untyped_storage().data_ptr() for tensor in [x, *modules.parameters()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(x)
    return sum(storage.nbytes() for storage in saved.values())


def measure(args: argparse.Namespace) -> dict:
    """Measures all forms; returns what is printed."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    mlp = build_projector("mlp2x_gelu", args.vision_dim, args.text_dim)
    ours = build_projector("cluster", args.vision_dim, args.text_dim, centres=args.centres)
    mlp, ours = mlp.to(args.device, dtype), ours.to(args.device, dtype)
    x = torch.randn(args.batch, args.tokens, args.vision_dim, device=args.device, dtype=dtype)
    x.requires_grad_()
    forms: dict[str, tuple[Step, nn.Module]] = {
        "mlp": (mlp, mlp),
        "ours": (ours, ours),
        "naive": (lambda x: naive_forward(ours, x), ours),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(args.repeats + 1):
        for name, (step, modules) in forms.items():
            times[name].append(seconds(step, modules, x))
    results = {
        name: {
            # The first round warms up.
            "seconds": round(min(times[name][1:]), 4),
            "peak_mib": round(peak_bytes(step, modules, x) / 2**20, 1),
            "saved_mib": round(saved_bytes(step, modules, x) / 2**20, 1),
        }
        for name, (step, modules) in forms.items()
    }

    def ratio(name: str, figure: str) -> float:
        return round(results[name][figure] / results["mlp"][figure], 3)

    return {
        "bench": "projector",
        "settings": vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "method": METHOD,
        "results": results,
        "ratios": {"time": ratio("ours", "seconds"), "memory": ratio("ours", "peak_mib")},
        "naive_ratios": {"time": ratio("naive", "seconds"), "memory": ratio("naive", "peak_mib")},
        "limits": LIMITS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--vision-dim", type=int, default=1024)
    parser.add_argument("--text-dim", type=int, default=4096)
    parser.add_argument("--centres", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--check", action="store_true", help="exit 1 beyond the limits")
    args = parser.parse_args()
    report = measure(args)
    print(json.dumps(report))
    exceeded = [name for name, limit in LIMITS.items() if report["ratios"][name] > limit]
    if args.check and exceeded:
        print(f"beyond the limits: {exceeded}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
