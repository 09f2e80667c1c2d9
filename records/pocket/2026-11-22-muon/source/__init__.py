"""The frozen trainer of October 2024: model, muon, recipe, train. A contestant copies this folder and edits it."""
