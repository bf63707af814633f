"""One day of learning, in plain torch; Ray only in workers.py, MLflow only in tracking.py.

Reading order: errors, config, data, draws, numbers, bodies, heads, features, model, losses, learner, step, metrics,
agree, checkpoint, predictions, pictures, tracking, day, workers.
"""
