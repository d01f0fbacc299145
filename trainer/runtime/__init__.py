"""The plumbing below the stage scripts: what would be the same line whatever the paper.

flags.py            the flags that every stage has
start.py            how a script starts: its process, model, engine, data
run.py              a run from its flags to its last save: training() yields steps, and does what is due after each
steps.py            which rows a process takes in which step; updates of a rollout; the schedule
engine.py           forward, backward, clip, step: on one process or several;  deepspeed_engine.py  with ZeRO
optimizers.py       Muon and AdamW
evaluation.py       held-out means;  meters.py  what the log tells;  run_log.py  progress line, log, curve, SwanLab
checkpoint.py       exact resume, and the self-test that proves it
devices.py          device and precision;  memory.py  will it fit?  places.py  can it write, and is it alone there?
distributed.py      processes and what they exchange
rl.py               what the RL stages share;  watch.py  their run-time checks;  reference.py  the frozen start
"""
