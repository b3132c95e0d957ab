"""The demo: the shipped digits model sampled as it is, vectorised and cached, timed and compared.

`run_demo` measures, `write_outputs` writes the picture and the numbers; neither prints. The command
``moeca-fx demo`` shows both on the terminal. Needs the extra ``demo``.
"""

from moeca_fx.demo.outputs import DemoFiles, write_outputs
from moeca_fx.demo.result import DemoResult, VariantResult
from moeca_fx.demo.run import DemoRun, run_demo
from moeca_fx.demo.settings import DemoSettings

__all__ = [
    "DemoFiles",
    "DemoResult",
    "DemoRun",
    "DemoSettings",
    "VariantResult",
    "run_demo",
    "write_outputs",
]
