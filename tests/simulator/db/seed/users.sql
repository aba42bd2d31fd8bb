-- The accounts; the password of both is demo-password. Loading this twice changes nothing.
INSERT INTO users (id, email, name, password_hash, created_at) VALUES
    (1, 'admin@example.com', 'Ada Admin', 'pbkdf2:sha256:260000$ewVDY0C7mqlyddlO$aa6dccd237855d7fe06327ef0bf29bc0cabc6148764821491e2e27b7af090608', '2025-01-06 09:00+00'),
    (2, 'sam@example.com', 'Sam Porter', 'pbkdf2:sha256:260000$5AMjKW2V7kb6sgJN$176e3be1920e50a94d90cd09c7727f3511a4bf705ddef847c58538599716582a', '2025-01-06 09:05+00')
ON CONFLICT (id) DO NOTHING;

SELECT setval(pg_get_serial_sequence('users', 'id'), max(id)) FROM users;
