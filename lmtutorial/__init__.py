"""Language models, training and decoding in PyTorch: correct, fast, and short enough to read.

Data flows one way, and so do imports:
corpora -> tokenizers -> batches -> models -> losses -> train -> checkpoint -> decode -> metrics.
Import from the module that holds the idea, for example ``from lmtutorial.models.lstm import LSTM``.
"""

__version__ = "0.1.0"
