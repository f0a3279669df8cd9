"""`make bench-cpu`: Powerband beside the engines that a user could pick instead, on this CPU. See __main__.py.

places.py      where peers and models lie (outside the repository)
install.py     peers, each in an environment of its own
shapes.py      the models' shapes, and what a step reads and computes
checkpoint.py  the same random weights for every engine; convert.py: in the peers' own formats
engines.py     what is compared: engine, precision, how it is started
worker.py      in a process of one engine: load, warm up, the rows; engine_*.py: one engine behind one interface
llama.py       the same for llama.cpp's own tools
served.py      the rows over HTTP, from load.py's client
quiet.py       how busy other processes are; limits.py and limits.c: what the machine can do
report.py      the table, and the JSON
"""
