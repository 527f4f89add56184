"""The pre-flight's report as text to read."""

from typing import Any

GIB, MIB = 2**30, 2**20
Report = dict[str, Any]


def text_of(name: str, report: Report) -> str:
    """A few lines about one topology; the first says whether the run fits."""
    if "error" in report:
        return f"\n{name}: DOES NOT WORK: {report['error']}"
    mesh = " x ".join(f"{axis}={side}" for axis, side in report["mesh"].items() if side > 1)
    lines = [
        f"\n{name}: {'fits' if report['fits'] else 'DOES NOT FIT'}",
        f"  {report['devices']} x {report['device']} on {_some(report['hosts'], 'host')}"
        f"{f', mesh {mesh}' if mesh else ''}; {report['batch_size']} clips a step, "
        f"{report['clips_a_device']:g} a device",
    ]
    for program, entry in report["programs"].items():
        lines += _program(program, entry)
    if "reading" in report:
        lines.append(_reading(report["reading"]))
    if "schedule" in report:
        lines.append(_schedule(report["schedule"]))
    if not any("estimate" in entry for entry in report["programs"].values()):
        lines.append("  no times: cycles are estimated for TPUs by name, for programs that fit")
    if "largest_batch" in report:  # last, since it is known last
        lines.append(_largest(report["largest_batch"]))
    return "\n".join(lines)


def clip_text(clip: Report) -> str:
    """A line about the cost of reading on this machine."""
    return (
        f"reading a clip takes {1e3 * clip['cpu_seconds']:.3g} ms of a core of this machine, "
        f"measured on {clip['measured_on']}"
    )


def _program(name: str, report: Report) -> list[str]:
    if report["failure"]:
        return [f"  {name}: DOES NOT COMPILE: {report['failure']}"]
    memory = report["memory"]
    lines = [f"  {name}: {_memory(report['fits'], memory)}"]
    parts = {part: size for part, size in memory["parts"].items() if size > memory["used"] / 1000}
    lines.append(f"    {', '.join(f'{part} {_size(size)}' for part, size in parts.items())}")
    beside = memory.get("beside_training")
    if beside is not None and beside != memory["used"]:
        lines.append(f"    with the rest of the training state beside it {_size(beside)}")
    lines.append(
        f"    compiled in {report['compile_seconds']:.0f} s "
        f"({report['compile_cpu_seconds']:.0f} s of CPU)"
    )
    if "flops" in report:
        lines.append(_flops(report["flops"]))
    if "exchanges" in report:
        lines.append(_exchanges(report["exchanges"]))
    if "estimate" in report:
        lines += _estimate(report["estimate"])
    return lines


def _memory(fits: bool, memory: Report) -> str:
    used, available = memory["used"], memory["available"]
    if available is None:
        return f"{_size(used)} a device; how much there is, is not known"
    share = f"{_size(used)} of {_size(available)} a device ({used / available:.0%})"
    return f"{'fits' if fits else 'DOES NOT FIT'}, {share}"


def _flops(flops: Report) -> str:
    kernels = sum(flops["kernels"].values())
    beside = f" beside {_some(kernels, 'run')} of kernels on each device" if kernels else ""
    return (
        f"    products of {_flop(flops['compiled'])}{beside}; the model's are "
        f"{_flop(flops['model'])}; outside of attention {flops['outside_attention_ratio']:.3f} "
        "times the model's"
    )


def _exchanges(exchanges: Report) -> str:
    if not exchanges:
        return "    no exchanges between devices"
    kinds = []
    for kind, entry in exchanges.items():
        counts = []
        if entry["count"]:
            counts.append(f"{entry['count']} of {entry['bytes'] / 1e6:.4g} MB in all")
        if entry["small"]:
            counts.append(f"{entry['small']} small")
        kinds.append(f"{kind} {' and '.join(counts)}")
    return f"    exchanges: {'; '.join(kinds)}"


def _estimate(estimate: Report) -> list[str]:
    mfu = f", MFU {estimate['mfu']:.1%}" if "mfu" in estimate else ""
    lines = [
        f"    estimated {1e3 * estimate['seconds']:.4g} ms{mfu}, "
        f"{estimate['clips_per_second']:.4g} clips/s (kernels {1e3 * estimate['kernels']:.4g} ms, "
        f"exchanges that nothing hides {1e3 * estimate['exchanging']:.4g} ms)"
    ]
    if "frozen_share" in estimate:
        share = f"{estimate['frozen_share']:.1%}"
        lines.append(f"    networks without a backward pass take {share} of the cycles")
    missing = {name: times for name, times in estimate["not_counted"].items() if times}
    if missing:
        what = ", ".join(f"{times} x {name}" for name, times in missing.items())
        lines.append(f"    not in the estimate, or not all of it: {what}")
    if estimate["loops_counted_once"]:
        lines.append(f"    loops of unknown length, counted once: {estimate['loops_counted_once']}")
    return lines


def _largest(largest: Report) -> str:
    if not largest["batch_size"]:
        return f"  largest batch that fits: none; {largest['fails_at']} clips fail"
    clips = f"{largest['clips_a_device']:g} clips a device, {largest['batch_size']} in all"
    used = f", {_size(largest['used'])} a device"
    if "mfu" in largest:
        used += f", estimated MFU {largest['mfu']:.1%}"
    fails = f"; {largest['fails_at']} fail" if largest["fails_at"] else ""
    return f"  largest batch that fits: {clips}{used}{fails}"


def _reading(reading: Report) -> str:
    size = reading["bytes_per_second_a_host"]
    storage = f"{size / 1e6:.4g} MB/s of files" if size else "sizes of files not known"
    return (
        f"  reading: {reading['clips_per_second_a_host']:.4g} clips/s a host keep "
        f"{reading['cores_a_host']:.1f} cores like this machine's busy (a host has "
        f"{reading['cores_there_are']}); {storage}"
    )


def _schedule(schedule: Report) -> str:
    if schedule["hours"] is None:
        return "  how long it trains is not known without videos: set config.preflight.videos"
    return (
        f"  training on {schedule['videos']} videos, {schedule['steps']} steps: estimated "
        f"{schedule['hours']:.3g} hours, {schedule['chip_hours']:.4g} chip hours"
    )


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def _flop(flop: float) -> str:
    return f"{flop / 1e12:.4g} TFLOP" if flop >= 1e11 else f"{flop / 1e9:.4g} GFLOP"


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
