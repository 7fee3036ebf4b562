"""One of several processes that run train.py or infer.py: `many_processes.py WHAT ARGS…`.

WHAT is `train`, `infer`, `steps` (train.py without what comes after the last step) or `raise:I:N`
(the same, and process I raises an exception after step N).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def main(what: str, argv: list[str]) -> int:
    if what == "infer":
        import infer

        return infer.main(argv)
    import train
    from moejax.training import session

    if what != "train":
        session.Session.finish = lambda self, *args, **more: self.placing.finish()
    if what.startswith("raise"):
        process, step = map(int, what.split(":")[1:])
        log = session.Session.log

        def log_and_fail(self, number, *rest):
            log(self, number, *rest)
            if (jax.process_index(), number) == (process, step):
                raise RuntimeError("the cat sat on the keyboard")

        session.Session.log = log_and_fail
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
