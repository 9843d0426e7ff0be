"""Compiler launcher: keep what the compiler says about each object beside it, as OBJECT.log.

An incremental build does not compile every file, so the output of one build is no record of the binary.
Standard library only: usage is `keep_log.py COMPILER ARGUMENTS...`.
"""

import subprocess
import sys

command = sys.argv[1:]
result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
if "-o" in command:
    with open(command[command.index("-o") + 1] + ".log", "w") as log:
        log.write(result.stdout)
if result.returncode or "warning" in result.stdout:
    sys.stderr.write(result.stdout)
sys.exit(result.returncode)
