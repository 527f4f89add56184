"""What every process of the tests begins with, as Python imports it from PYTHONPATH by itself.

Tracing makes many small objects, and Python would look for garbage in all that came before.
"""

import gc

gc.set_threshold(50_000, 20, 20)
