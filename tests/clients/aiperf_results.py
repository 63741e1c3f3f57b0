"""Whether all requests of an aiperf run were served: its folder of results is the argument."""

import json
import pathlib
import sys

(path,) = pathlib.Path(sys.argv[1]).rglob("profile_export_aiperf.json")
results = json.loads(path.read_text())
served = results["request_count"]["avg"]
failed = (results.get("error_request_count") or {"avg": 0})["avg"]
assert served == 20 and failed == 0, f"{served} requests were served, {failed} failed"
print(f"aiperf: {served:.0f} requests served, first token after {results['time_to_first_token']['avg']:.0f} ms")
