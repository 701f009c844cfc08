"""An engine process that plays a script instead of a model: run by path, with the engine's arguments.

`--script` is a list of what to do: `["load"]` reads frames up to a Load and answers Loaded (`["load", "CODE"]` fails
it), `["submit"]` reads up to a Submit, `["cancel"]` up to a Cancel and answers it, `["unload"]` likewise, `["text", T]`
sends a step with text for the last submitted sequence, `["end"]` ends it, `["bytes", HEX]` sends raw bytes, `["exit",
N]` leaves. After the script it waits to be told to leave.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from typing import Any

from millicent.core.steps import Overhead, OverheadKind, SequenceWork, StepRecord
from millicent.engine.protocol import (
    Cancel,
    FromEngine,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    Output,
    Shutdown,
    Step,
    Submit,
    ToEngine,
    Unload,
    Unloaded,
    encode_frame,
    to_engine_decoder,
)


class Player:
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")
        self.index = 0
        self.work = SequenceWork(0, 0, 0, 0, 0)
        self.send(Hello("cpu", os.getpid(), 10**9))

    def send(self, frame: FromEngine) -> None:
        self.socket.sendall(encode_frame(frame))

    def read(self) -> ToEngine:
        header = self.file.read(4)
        if len(header) < 4:
            sys.exit(1)
        frame: ToEngine = to_engine_decoder.decode(self.file.read(int.from_bytes(header, "big")))
        if isinstance(frame, Shutdown):
            sys.exit(0)
        return frame

    def until(self, kind: type) -> Any:
        while not isinstance(frame := self.read(), kind):
            pass
        return frame

    def overhead(self, model: str, kind: OverheadKind) -> Overhead:
        return Overhead("cpu", model, kind, time.monotonic_ns() - 1000, 1000)

    def play(self, action: str, *arguments: Any) -> None:
        match action:
            case "load" if arguments:
                self.send(LoadFailed(self.until(Load).model, "x: cannot be used", arguments[0]))
            case "load":
                model = self.until(Load).model
                self.send(Loaded(model, 64, 100, 200, self.overhead(model, OverheadKind.LOAD)))
            case "unload":
                model = self.until(Unload).model
                self.send(Unloaded(model, self.overhead(model, OverheadKind.UNLOAD)))
            case "submit":
                submit: Submit = self.until(Submit)
                self.work = SequenceWork(submit.sequence, len(submit.tokens), 0, 1, len(submit.tokens))
            case "cancel":
                self.until(Cancel)
                self.send(Step(None, (Output(self.work.sequence, 0, "", "cancelled"),)))
            case "text":
                self.step(Output(self.work.sequence, 1, arguments[0]))
            case "end":
                self.step(Output(self.work.sequence, 1, "", "stop"))
            case "bytes":
                self.socket.sendall(bytes.fromhex(arguments[0]))
            case "exit":
                sys.exit(arguments[0])

    def step(self, output: Output) -> None:
        record = StepRecord("cpu", "m", self.index, time.monotonic_ns() - 1000, 1000, (self.work,))
        self.index += 1
        self.send(Step(record, (output,)))
        read = self.work.kv_read_tokens + 1
        self.work = SequenceWork(self.work.sequence, 0, 1, 1, read)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    player = Player(arguments.socket)
    for action in json.loads(arguments.script):
        player.play(*action)
    while True:
        player.read()


if __name__ == "__main__":
    main()
