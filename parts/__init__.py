"""What a model may have besides: adapters, other schedules, Muon."""
