"""penny plan, penny machine: what would fit, and what this computer can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pennyweight.cli._common import DEFAULT_AXES, Json, app, errors, located, own_stdout, quiet_libraries

if TYPE_CHECKING:
    from pennyweight.prices.machine import Machine


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="As of penny fit, or a config.json. Weights are not read, and not fetched.")
    ],
    against: Annotated[str | None, typer.Option(help="A parent to compare with, as MODEL.")] = None,
    memory: str | None = None,
    weights: Annotated[str | None, typer.Option(help="Bytes, or a share of the model's in 16 bits: 22%.")] = None,
    ttft: str | None = None,
    tpot: str | None = None,
    throughput: str | None = None,
    prompt: str | None = None,
    new: str | None = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once; with --throughput the most that may be.")
    ] = None,
    context: str | None = None,
    cache: Annotated[str | None, typer.Option(help="Keys and values: float16, int8 or float32.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="A workload served as well, with its own bounds, as of penny fit. Repeatable."),
    ] = None,
    machine: Annotated[
        str, typer.Option(help='"this" one, measured, a shipped machine (penny machine --list), or a JSON file.')
    ] = "this",
    axes: Annotated[str | None, typer.Option(help=f"Comma-separated; by default {DEFAULT_AXES}.")] = None,
    as_json: Json = False,
) -> None:
    """What a model needs and what would fit, from its config alone."""
    with errors():
        from pennyweight import families
        from pennyweight.config import FitConfig, asked, merged
        from pennyweight.disk.opened import open_config
        from pennyweight.model.shapes import parameters
        from pennyweight.prices import planning
        from pennyweight.prices.machine import Machine
        from pennyweight.units import show_bytes, show_seconds

        wanted = merged(
            FitConfig(),
            asked(
                memory=memory,
                weights=weights,
                ttft=ttft,
                tpot=tpot,
                throughput=throughput,
                prompt=prompt,
                new=new,
                concurrency=concurrency,
                context=context,
                cache=cache,
                axes=axes,
                machine=machine,
                also=also,
            ),
        )
        wanted.check()
        config, load = open_config(located(model, only_config=True)), wanted.workload.resolve()
        shapes = families.shapes(config)
        device = _this_machine() if machine == "this" else Machine.load(machine)
        bounds = wanted.budget.resolve(parent_bytes=planning.stored_bytes(shapes, 16))
        with own_stdout():
            parent_bytes = planning.stored_bytes(shapes, 16)
            further = [demand.resolve(parent_bytes=parent_bytes) for demand in wanted.also]
            found = planning.plan(config, load, device, bounds, wanted.axes, further, scored_tokens=wanted.data.context)
        result = found.to_json()
        if against is not None:
            parent = families.shapes(open_config(located(against, only_config=True)))
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
        if found.longest is not None and load.context > found.longest:
            print(f"context      {load.context} tokens are asked for, the model takes up to {found.longest}")
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
        for count, spent in found.figures.items():
            together = f", {count} at once" if len(found.figures) > 1 else ""
            memory, work = show_bytes(spent["memory_bytes"]), show_bytes(found.workspace_bytes[count])
            times = f"TTFT {show_seconds(spent['ttft_seconds'])}   TPOT {show_seconds(spent['tpot_seconds'])}"
            rate = f"{spent['tokens_per_second']:.0f} tok/s"
            told = f"on {device.name}{together}   memory {memory}, {work} of it work space"
            print(f"{told}   {times}   {rate}   (computed)")
        for demand, spent in zip(further, found.also, strict=True):
            times = f"TTFT {show_seconds(spent['ttft_seconds'])}   TPOT {show_seconds(spent['tpot_seconds'])}"
            print(f"on {device.name}, {demand}   memory {show_bytes(spent['memory_bytes'])}   {times}   (computed)")
        print(f"verdict      {found.verdict}")


def _this_machine() -> Machine:
    from pennyweight.prices import measure
    from pennyweight.runs.progress import Terminal

    with Terminal() as listen:
        return measure.machine(listen=listen)


@app.command()
def machine(
    model: Annotated[
        str | None, typer.Argument(help="Also time the blocks this model, as of penny plan, could be made of.")
    ] = None,
    axes: Annotated[str | None, typer.Option(help=f"Comma-separated; by default {DEFAULT_AXES}.")] = None,
    prompt: str | None = None,
    new: str | None = None,
    concurrency: Annotated[int | None, typer.Option(min=1)] = None,
    context: Annotated[str | None, typer.Option(help="Tokens of KV cache per sequence; 0: prompt + new.")] = None,
    cache: Annotated[str | None, typer.Option(help="Keys and values: float16, int8 or float32.")] = None,
    context_tokens: Annotated[int, typer.Option(min=1, help="Tokens per row of calibration text.")] = 512,
    again: Annotated[bool, typer.Option("--again", help="Measure this machine, or the model's blocks, anew.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the shipped machine descriptions.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the description to a JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this computer once: bandwidth, arithmetic, and the time of a model's possible blocks."""
    with errors(resumes=model is not None and not again):  # every block is remembered as soon as it is measured
        from pennyweight.config import FitConfig, asked, merged
        from pennyweight.prices.machine import Machine

        if listed:
            for name in Machine.shipped():
                print(name)
            return
        wanted = merged(
            FitConfig(), asked(prompt=prompt, new=new, concurrency=concurrency, context=context, cache=cache, axes=axes)
        )
        wanted.check()
        place = None if model is None else located(model, only_config=True)
        if save is not None and place is not None:
            from pennyweight.disk.places import apart

            apart(save, "--save", {"the model": place})
        import dataclasses

        from pennyweight.prices import measure
        from pennyweight.runs.progress import Terminal
        from pennyweight.runs.space import full_disk_is_one_error

        with Terminal() as listen, full_disk_is_one_error():
            found = measure.machine(again=again, listen=listen)
        result: dict[str, Any] = dataclasses.asdict(found)  # type: ignore[arg-type]
        if save is not None:
            save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if place is not None:
            from pennyweight import families
            from pennyweight.disk.opened import open_config
            from pennyweight.prices import offers

            quiet_libraries()
            config = open_config(place)
            shapes, load = families.shapes(config), wanted.workload.resolve()
            kept = measure.cache_folder() / "latencies.json"
            every = offers.all_shapes(shapes, wanted.axes, scored_tokens=context_tokens)
            with Terminal() as listen, full_disk_is_one_error():
                models = measure.Models(config, shapes, load, cache=kept, again=again)
                times = models.latencies(every, listen=listen)
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
