"""How the ranks of a communicator reduce large arrays: over memory that a node shares, or through the MPI library.

A transport performs ``allreduce`` calls, allocates the memory of `Communicator.empty` and makes the plans of
`Communicator.allreduce_plan`.  It is chosen once per communicator, by all its ranks together (`choice`).
"""
