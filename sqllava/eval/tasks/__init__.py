"""The tasks by name. A new one is a file with a Task in it and a line here."""

from sqllava.eval.tasks import (
    captions,
    gqa,
    llavabench,
    mmbench,
    mme,
    mmvet,
    pope,
    qbench,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
    vqav2,
)
from sqllava.eval.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        vqav2.TASK,
        gqa.TASK,
        vizwiz.TASK,
        scienceqa.TASK,
        textvqa.TASK,
        pope.TASK,
        mme.TASK,
        mmbench.TASK,
        mmbench.TASK_CN,
        seed.TASK,
        llavabench.TASK,
        mmvet.TASK,
        qbench.TASK,
        qbench.TASK_ZH,
        *captions.TASKS,
    )
}


def get_task(name: str) -> Task:
    """Looks a task up by its name; raises ValueError naming the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose from {list(TASKS)}")
    return TASKS[name]
