"""What the compiler knows of a program for devices that need not be there.

`topology` names devices, `program.compile_for` compiles for them and reads the result: memory, work
and collectives of the compiled text (`hlo`, `work`), cycles of kernels (`bundles`), and a time that
is made of them (`estimate`). Nothing in here knows of networks or configs.
"""
