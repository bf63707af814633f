"""One day of learning, in plain torch; Ray only in nodes.py and workers.py, MLflow only in tracking.py.

Reading order: errors, intervals, storage, ledger, expressions, usual, sanity, gate, config, checks, configfile,
pieces, lanes, schema, columns, hours, files, folders, delivery, drift, plan, data, due, late, draws, numbers,
features, layers, bodies, encoders, towers, losses, heads, auxiliary, model, objective, balance, health, learner,
counted, dense, step, bootstrap, metrics, facts, norms, agree, quarantine, checkpoint, writing, retention, saving,
predictions, parts, serving, pictures, tracking, day, watch, nodes, workers.
"""
