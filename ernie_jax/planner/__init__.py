"""What a model needs on given chips, and what it costs there: memory, collectives, roofline."""
