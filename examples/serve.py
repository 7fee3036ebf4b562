"""Starts a server of the packaged model, asks it as OpenAI's clients do, and stops it."""

import json
import subprocess
import sys
import urllib.request

PROMPT = "import json\n\n\ndef load(path):\n    with open("


def ask(url: str, **body):
    """POST; the response can be read line by line."""
    head = {"content-type": "application/json"}
    data = json.dumps({"prompt": PROMPT, "max_tokens": 24, "temperature": 0, **body}).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, head), timeout=120)


# What a shell would start with `moejax-infer serve`. Short texts compile fewer steps; without
# --no-warm-up all are compiled before the first request.
flags = ["--port", "0", "--max-len", "64", "--max-rows", "2", "--no-warm-up"]
command = [sys.executable, "-m", "infer", "serve", *flags]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    try:
        for line in server.stderr:
            print(line, end="")
            if line.startswith("serving "):  # serving 'reference' at http://127.0.0.1:PORT/v1
                break
        else:
            sys.exit("the server did not start")
        url = line.split()[-1] + "/completions"

        with ask(url) as response:
            answer = json.load(response)
        whole = answer["choices"][0]["text"]
        print(PROMPT + whole)
        print(answer["usage"])

        # The same as a stream: events of one line each, the last of which is [DONE].
        pieces = []
        with ask(url, stream=True) as response:
            for event in filter(None, (line.decode().strip() for line in response)):
                data = event.removeprefix("data: ")
                if data != "[DONE]":
                    pieces.append(json.loads(data)["choices"][0]["text"])
        print(f"streamed in {len(pieces)} pieces")
        assert "".join(pieces) == whole and len(pieces) > 5 and data == "[DONE]"
        assert answer["usage"]["completion_tokens"] <= 24
    finally:
        server.terminate()  # or Ctrl-C: what is under way is finished first
        log = server.stderr.read()
print(f"stopped with exit code {server.returncode}; its log of requests:\n{log}", end="")
assert server.returncode == 0
