"""The referee and everything that judges: tracks, launch, events, records, rules, statistics. Imports data, never a trainer."""
