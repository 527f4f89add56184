"""Memory, work and time of compiled programs, for devices that need not be there.

`topology` names devices, `program.compile_for` compiles for them and reads the result: memory, work
and collectives of the compiled text (`hlo`, `work`), cycles of kernels (`bundles`), and the time
estimated from them (`estimate`). Nothing in here knows of networks or configs.
"""
