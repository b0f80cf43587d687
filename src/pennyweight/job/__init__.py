"""The main job: a model and a budget in, the model that fits best out.

    plan     what the model is, what each slot may become, whether the budget can be met at all
    stats    one calibration pass over the parent
    score    replace-1-block: what each choice alone costs in quality
    solve    the exact best choice per slot within the budget (and the other budgets of a sweep)
    build    the child in 16 bits
    heal     distillation, block by block and whole
    pack     fewer bits where chosen; the folder that is shipped
    verify   open it again and hold it against every promise
    report   report.json, report.html, model card

Each stage leaves its result in the run folder; a stopped job goes on where it was, to the same result.
"""
