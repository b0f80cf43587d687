"""penny plan, penny machine: what would fit, and what this computer can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli._common import DEFAULT_AXES, Json, app, errors, own_stdout, quiet_libraries


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="A model folder or a config.json; weights are not read.")],
    against: Annotated[Path | None, typer.Option(help="A parent to compare with: folder or config.json.")] = None,
    memory: str | None = None,
    weights: str | None = None,
    ttft: str | None = None,
    tpot: str | None = None,
    throughput: str | None = None,
    prompt: str = "256",
    new: str = "128",
    concurrency: int = 1,
    context: str = "0",
    machine: Annotated[str, typer.Option(help="A shipped machine (penny machine --list) or a JSON file.")] = "h100",
    axes: str = DEFAULT_AXES,
    as_json: Json = False,
) -> None:
    """What a model needs and what would fit, from its config alone."""
    with errors():
        from pennyweight import families
        from pennyweight.config import BudgetConfig
        from pennyweight.disk.checkpoint import read_config
        from pennyweight.model.demand import Workload
        from pennyweight.model.shapes import parameters
        from pennyweight.prices import planning
        from pennyweight.prices.machine import Machine
        from pennyweight.units import parse_count, show_bytes, show_seconds

        config = read_config(model)
        shapes = families.shapes(config)
        load = Workload(
            prompt=parse_count(prompt), new=parse_count(new), concurrency=concurrency, context=parse_count(context)
        )
        budget = BudgetConfig(memory=memory, weights=weights, ttft=ttft, tpot=tpot, throughput=throughput)
        device = Machine.load(machine)
        bounds = budget.resolve(parent_bytes=planning.stored_bytes(shapes, 16))
        with own_stdout():
            found = planning.plan(config, load, device, bounds, axes.split(","))
        result = found.to_json()
        if against is not None:
            parent = families.shapes(read_config(against))
            result["against"] = {
                "parameters": parameters(parent),
                "kv_bytes": {tokens: planning.sequence_kv_bytes(parent, tokens) for tokens in found.kv_bytes},
                "kv_saving": {tokens: planning.kv_saving(parent, shapes, tokens) for tokens in found.kv_bytes},
                "mean_kv_saving": planning.mean_kv_saving(parent, shapes, load),
            }
        if as_json:
            print(json.dumps(result))
            return
        print(f"parameters   {found.parameters / 1e9:.3f} B")
        print(
            "weights      "
            + "   ".join(f"{bits} bits {show_bytes(count)}" for bits, count in found.weight_bytes.items())
        )
        print(f"smallest     {show_bytes(found.smallest_bytes)} with every axis at its cheapest")
        for tokens, count in found.kv_bytes.items():
            line = f"KV cache     {tokens:>7} tokens  {count / 2**20:10.1f} MiB"
            if against is not None:
                beside = result["against"]
                line += f"   parent {beside['kv_bytes'][tokens] / 2**20:10.1f} MiB"
                line += f"   saved {beside['kv_saving'][tokens]:6.1%}"
            print(line)
        if against is not None:
            saved = result["against"]["mean_kv_saving"]
            print(f"KV cache     mean over {load.prompt}+{load.new} tokens: saved {saved:.1%} of the parent's")
        print(f"work space   {show_bytes(found.workspace_bytes)}")
        spent = found.figures
        times = f"TTFT {show_seconds(spent['ttft_seconds'])}   TPOT {show_seconds(spent['tpot_seconds'])}"
        rate = f"{spent['tokens_per_second']:.0f} tok/s"
        print(f"on {device.name}   memory {show_bytes(spent['memory_bytes'])}   {times}   {rate}   (computed)")
        print(f"verdict      {found.verdict}")


@app.command()
def machine(
    model: Annotated[Path | None, typer.Argument(help="Also time the blocks this model could be made of.")] = None,
    axes: Annotated[str, typer.Option(help="Comma-separated axes.")] = DEFAULT_AXES,
    prompt: str = "256",
    new: str = "128",
    concurrency: int = 1,
    context: Annotated[str, typer.Option(help="Tokens of KV cache per sequence; 0: prompt + new.")] = "0",
    context_tokens: Annotated[int, typer.Option(help="Tokens per row of calibration text.")] = 512,
    again: Annotated[bool, typer.Option("--again", help="Forget earlier measurements.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the shipped machine descriptions.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the description to a JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this computer once: bandwidth, arithmetic, and the time of a model's possible blocks."""
    with errors(resumes=model is not None and not again):  # every block is remembered as soon as it is measured
        from pennyweight.prices.machine import Machine

        if listed:
            for name in Machine.shipped():
                print(name)
            return
        if save is not None and model is not None:
            from pennyweight.disk.places import apart

            apart(save, "--save", {"the model": model})
        import dataclasses

        from pennyweight.prices import measure
        from pennyweight.runs.progress import Terminal

        with Terminal() as listen:
            found = measure.machine(again=again, listen=listen)
        result: dict[str, Any] = dataclasses.asdict(found)
        if save is not None:
            save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if model is not None:
            from pennyweight import families
            from pennyweight.disk.checkpoint import read_config
            from pennyweight.model.demand import Workload
            from pennyweight.prices import offers
            from pennyweight.runs.progress import Terminal
            from pennyweight.units import parse_count

            quiet_libraries()
            config = read_config(model)
            shapes = families.shapes(config)
            load = Workload(
                prompt=parse_count(prompt), new=parse_count(new), concurrency=concurrency, context=parse_count(context)
            )
            cache = measure.cache_folder() / "latencies.json"
            if again:
                cache.unlink(missing_ok=True)
            wanted = offers.all_shapes(shapes, axes.split(","), scored_tokens=context_tokens)
            with Terminal() as listen:
                times = measure.Models(config, shapes, load, cache=cache).latencies(wanted, listen=listen)
            result["blocks"] = [
                {"shape": str(shape), "prefill_seconds": prefill, "decode_seconds": decode}
                for shape, (prefill, decode) in times.blocks.items()
            ]
            result["rest"] = [
                {"logits": str(stored), "prefill_seconds": prefill, "decode_seconds": decode}
                for stored, (prefill, decode) in times.rest.items()
            ]
        if as_json:
            print(json.dumps(result))
            return
        print(found.name)
        print(f"memory     {found.memory_bytes / 2**30:.1f} GiB")
        print(f"bandwidth  {found.bandwidth / 1e9:.1f} GB/s")
        print(f"bfloat16   {found.flops / 1e9:.0f} GFLOP/s")
        for block in result.get("blocks", ()):
            prefill, decode = block["prefill_seconds"], block["decode_seconds"]
            print(f"prefill {1e3 * prefill:9.3f} ms   decode {1e3 * decode:8.4f} ms   {block['shape']}")
        if save is not None:
            print(save)
