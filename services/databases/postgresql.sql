-- Run once, when the data folder is made. The server's role owns its two databases and nothing else. The superuser keeps no
-- password: he gets in from inside the container alone, as `psql --username postgres`.
\getenv password POSTGRES_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
ALTER ROLE postgres PASSWORD NULL;
