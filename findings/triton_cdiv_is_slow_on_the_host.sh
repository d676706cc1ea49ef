#!/usr/bin/env bash
# triton.cdiv and triton.next_power_of_2 are what Triton's tutorials size a grid with, on the host, before each launch.
# Since 3.5 they are "constexpr functions" there, too, whose arguments and result are unwrapped and wrapped: microseconds
# where 3.4 took a fifth of one. Half a dozen of them before a launch then take as long on the host as the launch itself.
# What works on every release is -(-a // b), and 1 << (n - 1).bit_length().
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/3.4.0" triton==3.4.0
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/3.6.0" triton==3.6.0
measure='
import timeit

import triton


def microseconds(call):
    return 1e6 * min(timeit.repeat(call, number=5_000, repeat=9)) / 5_000


a, b = 1000, 128
times = [microseconds(call) for call in (lambda: triton.cdiv(a, b), lambda: triton.next_power_of_2(a), lambda: -(-a // b))]
print(f"triton {triton.__version__}: cdiv {times[0]:.2f} us, next_power_of_2 {times[1]:.2f} us, in Python {times[2]:.2f} us")
with open("times.txt", "a") as file:
    print(times[0], file=file)
'
cd "$folder"
for release in 3.4.0 3.6.0; do
    PYTHONPATH="$folder/$release" "$folder/venv/bin/python" -c "$measure"
done
"$folder/venv/bin/python" - <<'PY'
plain, wrapped = map(float, open("times.txt"))
assert wrapped > 5 * plain, f"the behaviour has changed: cdiv takes {plain:.2f} us in 3.4.0 and {wrapped:.2f} in 3.6.0"
print(f"as described: cdiv takes {wrapped / plain:.0f} times as long in 3.6.0 as in 3.4.0")
PY
