-- Run once, when the data folder is made, after the user and its first database. MariaDB's root gets in from inside the
-- container alone, as `mariadb --user=root`.
CREATE DATABASE mlflow_auth;
GRANT ALL ON mlflow_auth.* TO 'mlflow'@'%';
