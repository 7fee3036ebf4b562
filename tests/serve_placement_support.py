"""What the tests of serving that follows its traffic share."""

import threading

from moejax.placement import controller


class Blocked:
    """Stands in for `Controller.look`: waits until it may go on."""

    def __init__(self, monkeypatch):
        self.asked, self.go = threading.Event(), threading.Event()
        look = controller.Controller.look

        def wait(itself, statistics):
            self.asked.set()
            assert self.go.wait(60)
            return look(itself, statistics)

        monkeypatch.setattr(controller.Controller, "look", wait)
