"""Leaving with the model: a finished run's student in the formats of others, each loaded anew and compared.

A format is a `Format`, a file a kind; `README.md`, written beside what it names, says what the model is.
"""

from .formats import FORMATS as FORMATS
from .student import Student as Student
from .writing import Export as Export
from .writing import Written as Written
from .writing import export_run as export_run
