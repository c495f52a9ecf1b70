"""Language models, all with one contract: `lmtutorial.models.cache.LanguageModel`."""
