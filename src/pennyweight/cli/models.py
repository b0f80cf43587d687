"""penny models: real models that were tried."""

from __future__ import annotations

import json

from pennyweight.cli._common import Json, app, errors


@app.command()
def models(as_json: Json = False) -> None:
    """Real models that were tried, what was measured on them, and which are on this machine. Their names may be typed
    as MODEL."""
    with errors():
        from pennyweight.disk import hub, tried
        from pennyweight.prices.measure import cache_folder
        from pennyweight.units import show_bytes

        found = {}
        for name, model in tried.models().items():
            file = cache_folder() / "models" / name / model.file
            places = [model.hub] if hub.cached(hub.Name(model.hub)) else []
            found[name] = {**model.model_dump(), "here": places + ([str(file)] if file.is_file() else [])}
        if as_json:
            print(json.dumps(found))
            return
        for name, model in tried.models().items():
            print(f"{name:<11} {model.hub}, {model.family}, {model.licence}")
            size = f"{show_bytes(2 * model.parameters)} in 16 bits"
            print(
                f"            {model.parameters / 1e6:.0f} M parameters, {size}; {model.file} {show_bytes(model.bytes)}"
            )
            for one in model.measured:
                print(f"            {one.what}: {one.value} ({one.machine}; {one.where})")
            print(f"            {'here: ' + ', '.join(found[name]['here']) if found[name]['here'] else 'not here yet'}")
